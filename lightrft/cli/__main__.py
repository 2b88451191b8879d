"""``python -m lightrft.cli``: the ``lightrft`` command where its script is not on the path."""

from lightrft.cli import main

main()
