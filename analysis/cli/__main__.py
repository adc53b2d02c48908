"""So that `accelerate launch --module analysis.cli train SPEC.toml` works."""

from analysis.cli import main

main()
