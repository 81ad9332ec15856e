"""`python -m service` is `heatlens`."""

from service.cli.main import main

main()
