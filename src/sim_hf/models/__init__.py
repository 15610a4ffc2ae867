"""Networks: one folder per architecture, each a flat slice that imports nothing else of this package but single files of `sim`.
`architectures` finds the one that a folder, a Hub id or a preset belongs to."""
