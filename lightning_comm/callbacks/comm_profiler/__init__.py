"""The callback that measures a run's communication while it trains."""
