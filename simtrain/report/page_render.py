"""Filling the template: one file with style, data and code inside."""

from __future__ import annotations

from importlib.resources import files

from simtrain import __version__
from simtrain.core.errors import InputError
from simtrain.report.page import Page, command_of


def render_page(page: Page) -> str:
    """Returns the page as HTML.

    Raises:
        InputError: jinja2 or plotly is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError(f"a report needs jinja2 and plotly, and {error.name} is not installed: pip install jinja2 plotly") from None
    folder = files("simtrain.report") / "templates"
    read = {name: (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    drawn = [(f"figure-{i}-{j}", f) for i, s in enumerate(page.sections) for j, (_, f) in enumerate(s.figures)]
    return environment.from_string(read["page.html"]).render(
        page=page,
        command=command_of(page) if page.strategy else "",
        figures=dict(drawn),
        style=read["page.css"],
        code=read["page.js"],
        plotly=get_plotlyjs() if drawn else "",
        version=__version__,
    )
