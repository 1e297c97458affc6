"""The command line: each command is one call of the function of the same name in `segadapt`."""
