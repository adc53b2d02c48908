"""So that `accelerate launch --module loopmdm.analysis.cli train SPEC.toml` works."""

from loopmdm.analysis.cli import main

main()
