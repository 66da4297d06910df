"""All pages of the site as Markdown, by path."""

from layer_pages import layer_page
from memzoo.zoo.registry import LAYERS, SUBLAYERS
from readmes import PAGES, expanded
from reference import FOLDERS, command_page, configs_page, modules_page


def written() -> dict[str, str]:
  """The pages in `pages/`, with what they include."""
  paths = {path.relative_to(PAGES).as_posix(): path for path in sorted(PAGES.rglob("*.md"))}
  return {page: expanded(path.read_text(encoding="utf-8"), page) for page, path in paths.items()}


def generated() -> dict[str, str]:
  """The pages of layers and of the reference."""
  pages = {f"layers/{name}.md": layer_page(name) for name in LAYERS | SUBLAYERS}
  pages |= {"reference/command.md": command_page(), "reference/configs.md": configs_page()}
  return pages | {f"reference/{folder}.md": modules_page(folder) for folder in FOLDERS}
