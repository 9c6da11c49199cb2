"""Pictures of disks: measured, laid out once, drawn as SVG or PNG."""
