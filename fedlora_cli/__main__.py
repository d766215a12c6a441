"""`python -m fedlora_cli`."""

from fedlora_cli.main import main

main()
