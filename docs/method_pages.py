"""For the documentation: one page per method, generated from its signature and docstring."""

import inspect

from mkdocs.structure.files import File

from suture.learned import all_methods


def on_files(files, config):
    """Add methods.md and methods/NAME.md to the site."""
    pages = {name.replace("/", "_"): method for name, method in all_methods().items()}
    lines = [f"- [`{method.name}`](methods/{page}.md): {method.knobs.summary}" for page, method in pages.items()]
    files.append(File.generated(config, "methods.md", content="# Methods\n\n" + "\n".join(lines) + "\n"))
    for page, method in pages.items():
        files.append(File.generated(config, f"methods/{page}.md", content=method_page(method)))
    return files


def method_page(method) -> str:
    """Name, paper, what it does, its knobs with their defaults, and the line that runs it."""
    described = (inspect.getdoc(method.knobs.function) or "").split(">>>")[0].strip()
    shown = lambda value: "null" if value is None else list(value) if isinstance(value, tuple) else value
    knobs = [f"| `method.{knob}` | `{shown(value)}` |" for knob, value in method.knobs.defaults.items()]
    aliases = f"Also: {', '.join(f'`{alias}`' for alias in method.aliases)}.\n\n" if method.aliases else ""
    table = "| knob | default |\n|---|---|\n" + "\n".join(knobs) if knobs else "It has no knobs."
    line = f"    suture method={method.name} modelpool=glyphs8 taskpool=glyphs8"
    return f"# {method.name}\n\n{described}\n\n{aliases}Paper: <{method.paper}>\n\n{table}\n\n{line}\n"
