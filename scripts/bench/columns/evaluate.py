"""The columns of the tables of docs/guides/evaluate.md."""

from columns import Columns

VERDICTS: Columns = (
    ("drop", "{drop:.0%}"),
    ("prompts", "{prompts:d}"),
    ("ship", "{ship:.1%}"),
    ("do not ship", "{do_not_ship:.1%}"),
    ("cannot tell", "{cannot_tell:.1%}"),
    ("right", "{right:.1%}"),
    ("wrong", "{wrong:.1%}"),
    ("decided by more", "{decided:.0%}"),
)
COLUMNS: dict[str, Columns] = {
    "verdict-power": VERDICTS,
    "verdict-power-graded": VERDICTS,
}
