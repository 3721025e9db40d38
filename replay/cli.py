"""``agentsdpo replay``: look at, question, repair and share a store. Verbs parse, call and print, nothing else."""

import typer

from agentsdpo.replay import cli_formats, cli_keep, cli_log, cli_make, cli_mend, cli_read, cli_share

app = typer.Typer(
    name="replay", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Look at, question, repair and share a replay store.")
for part in (cli_make, cli_read, cli_log, cli_mend, cli_keep, cli_share, cli_formats):
    app.registered_commands += part.app.registered_commands
