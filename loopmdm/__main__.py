"""`python -m loopmdm` is `loopmdm`."""

from loopmdm.analysis.cli import main

main()
