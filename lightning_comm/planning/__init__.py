"""What measurements say: projections, verdicts and the pages that show them. Never torch."""
