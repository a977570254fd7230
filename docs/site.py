"""A hook of mkdocs: the README is the first page, its links to docs/ being those of the site."""

from pathlib import Path

from mkdocs.structure.files import File

README = Path(__file__).parent.parent / "README.md"


def on_files(files, config):
    """Add the README as index.md; links to files outside docs/ become plain text."""
    text = README.read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files
