"""The commands `lightning-comm fit`, `validate`, `test` and `predict`: Lightning's command line."""
