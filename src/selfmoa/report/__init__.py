"""The report of a run: one self-contained page and one Markdown file from one plain dict.

The dict, the "story", holds JSON values only, so a report can be written again from disk without
the models, by another version, or by hand. Its keys (all but `name` and `phases` may be empty):

- `name`, `recipe`, `description`, `seed`, `headline` [sentence]: what was run, and in whose words;
- `phases` [{name, kept, metrics {name: estimate}}]: "instruct", "reset", "round 1" ... in order;
  `kept` is false where the gate rejected a round and the policy fell back;
- `final`: the name of the phase whose policy is the result; `stop` {round, reason};
- `heat` {categories, styles, heldout_styles, phases {phase: rows of estimates}}: attack success;
- `judges`, `pairs`, `red_team`: one entry a judge and round, a round, a round;
- `examples` [{title, intent, prompt, before, after, redacted}]: answers {phase, text, label};
- `settings` {dotted key: value} and `versions` {package: version}.

An estimate is a `records.Estimate` as JSON. Functions here load jinja2 when called, not when
imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["render_html", "render_markdown"]


def render_html(story: Mapping[str, Any]) -> str:
    """Return the report of `story` as one HTML page: no scripts, no remote assets."""
    from selfmoa.report import page

    return page.render_html(story)


def render_markdown(story: Mapping[str, Any]) -> str:
    """Return the report of `story` as Markdown, with tables in place of the charts."""
    from selfmoa.report import page

    return page.render_markdown(story)
