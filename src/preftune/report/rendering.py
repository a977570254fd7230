"""Pages and cards from their Jinja templates."""

from functools import partial
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from preftune.evaluate.statistics import interval, percent
from preftune.report.record import finite, short

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=select_autoescape(["html.jinja"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def shown(value: object) -> str:
    """A number with four digits, else the value as text, – for none."""
    return short(value) or str("–" if value is None else value)


TEMPLATES.filters |= {"shown": shown, "percent": percent, "interval": interval, "finite": finite}
TEMPLATES.filters |= {"thousands": "{:,}".format, "yaml": partial(yaml.safe_dump, sort_keys=False, allow_unicode=True)}


def render(template: str, **values: object) -> str:
    """A page from its template; `values` are plain Python values, which the template escapes."""
    return TEMPLATES.get_template(template).render(values)
