"""What mkdocs cannot do by itself: pages made from the commands and recipes, and links to files of the repository."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.testing import CliRunner

from tahoex1_hf.cli.app import app
from tahoex1_hf.common.recipes import FOLDERS, packaged_recipes

ROOT = Path(__file__).resolve().parents[2]
# A link or image of Markdown whose target is a path, with an anchor or without.
LINK = re.compile(r"(?P<head>\]\()(?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and leave out what no page shows."""
    for name, text in (("reference/commands.md", commands_page()), ("reference/recipes.md", recipes_page())):
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that lead out of docs/ at the repository on the web; a file that is not there is an error."""

    def to_the_web(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), match["path"]))
        if path.startswith("docs/") and (path.endswith(".md") or files.get_file_from_path(path[5:])):
            return match[0]  # mkdocs checks it
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_uri}: there is no {path}")
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{match['head']}{config.repo_url.rstrip('/')}/{kind}/main/{path}{match['anchor'] or ''})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(to_the_web, part) for part in parts)


def commands_page() -> str:
    """Return the reference of all commands: their help texts."""
    app.rich_markup_mode = None  # plain text
    lines = [
        "# Commands",
        "",
        "These are the commands' own help texts (`tahoex1 COMMAND --help`).",
        "`python -m tahoex1_hf` is the same command.",
        "",
    ]
    names = [[str(command.name)] for command in app.registered_commands]
    names += [
        [str(g.name), str(command.name)]
        for g in app.registered_groups
        for command in g.typer_instance.registered_commands
    ]
    for words in names:
        name = " ".join(words)
        result = CliRunner().invoke(app, [*words, "--help"], prog_name="tahoex1")
        if result.exit_code or "Usage: tahoex1" not in result.output:
            raise PluginError(f"tahoex1 {name} --help: {result.output}")
        lines += [f"## tahoex1 {name}", "", "```text", result.output.strip(), "```", ""]
    return "\n".join(lines)


def recipes_page() -> str:
    """Return all recipes of the package, each with its comments."""
    lines = [
        "# Recipes",
        "",
        "`tahoex1 recipes` lists these, and `tahoex1 recipes NAME > mine.yaml` writes one to change.",
        "`pretrain` and `finetune` take `KEY=VALUE` behind the recipe's name.",
        "",
    ]
    for command in FOLDERS:
        for name, path in packaged_recipes(command).items():
            lines += [f"## {command}: {name}", "", "```yaml", path.read_text(encoding="utf-8").strip(), "```", ""]
    return "\n".join(lines)
