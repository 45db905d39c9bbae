"""Pages, tables, figures and sentences, made from files of a run or from measurements."""
