"""Pages, tables, figures and sentences, made of what is on disk or was measured."""
