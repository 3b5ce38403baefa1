"""The page at `/`: whole in one file, and under a policy that lets nothing else run."""

import base64
import hashlib
import html.parser
import pathlib
import tomllib

from dsv4_jax.serving.http import page

ROOT = pathlib.Path(__file__).parents[3]


class Reader(html.parser.HTMLParser):
    """The text of scripts and styles, every attribute, and ids of elements."""

    def __init__(self):
        super().__init__()
        self.inside, self.texts, self.attributes, self.ids = None, {}, [], set()

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.attributes += [name for name, _ in attributes]
        self.ids |= {value for name, value in attributes if name == "id"}

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        self.texts[self.inside] = self.texts.get(self.inside, "") + data


def read(text):
    reader = Reader()
    reader.feed(text)
    return reader


def test_the_policy_names_the_script_and_the_style(acted):
    response = acted.client.get("/")
    assert response.status_code == 200 and response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    reader = read(response.text)
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(reader.texts[tag].encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'" and "unsafe" not in str(policy)


def test_it_loads_nothing_and_writes_no_markup():
    text = page.page()[0].decode()
    reader = read(text)
    assert not {"src", "href", "style", "srcset"} & set(reader.attributes)
    assert not [name for name in reader.attributes if name.startswith("on")]
    assert "://" not in text
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert danger not in text
    used = {part.split('"')[0] for part in reader.texts["script"].split('at("')[1:]}
    assert used <= reader.ids and "stop" in used


def test_it_needs_no_key_and_shows_none(locked):
    response = locked.client.get("/")
    assert response.status_code == 200 and "key-of-tests" not in response.text
    assert locked.client.get("/metrics").status_code == 401


def test_it_is_part_of_the_package():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert any(pathlib.PurePath(page.FILE).match(pattern) for pattern in data["*"])
