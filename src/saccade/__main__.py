"""`python -m saccade` is `saccade`: torchrun wants a module."""

from saccade.cli import main

raise SystemExit(main())
