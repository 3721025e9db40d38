"""``python -m agentsdpo``: the same as the command ``agentsdpo``."""

from agentsdpo.cli import main

if __name__ == "__main__":
    main()
