"""Networks: one folder per architecture, each a flat slice that imports nothing else of this package."""
