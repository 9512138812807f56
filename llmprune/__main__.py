"""`python -m llmprune` is the same program as `llmprune`."""

from llmprune.cli import main

if __name__ == "__main__":
    main()
