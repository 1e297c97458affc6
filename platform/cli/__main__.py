"""`python -m segadapt.platform.cli` is `segadapt`."""

from segadapt.platform.cli.main import main

main()
