"""`python -m service` is `heatlens`."""

from service.cli import main

main()
