"""Help as plain text in sections, which can be piped and keeps the names of options whole on a narrow terminal."""

from typer.core import TyperCommand


class Command(TyperCommand):
    """A command whose help lists its options under the titles of their panels."""

    def format_options(self, ctx, formatter) -> None:
        sections = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                panel = getattr(param, "rich_help_panel", None) or "Options"
                title = "Arguments" if param.param_type_name == "argument" else panel
                sections.setdefault(title, []).append(record)
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=formatter.width // 3)  # longer names get a line of their own
