"""Off-policy self-distillation for agents: collect, hint, learn, publish. ``docs/glossary.md`` has the words."""

__version__ = "0.1.0"
