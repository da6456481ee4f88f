"""Read a rendered page back: its elements with attributes and text, as a browser sees them."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "img", "br"}


@dataclass
class Node:
    tag: str
    attributes: dict[str, str | None]
    children: list["Node"] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> str:
        return self.attributes[name] or ""

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def walk(self):
        yield self
        for child in self.children:
            yield from child.walk()

    def all(self, tag: str | None = None, class_: str | None = None) -> list["Node"]:
        return [
            node
            for node in self.walk()
            if tag in (None, node.tag) and (class_ is None or class_ in node.classes)
        ]

    def one(self, tag: str | None = None, class_: str | None = None) -> "Node":
        return self.all(tag, class_)[0]


class Reader(HTMLParser):
    """Builds the tree; a tag that does not match its opening is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Node("document", {})]

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"repeated attribute in <{tag}>"
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        for node in self.open:
            node.pieces.append(data)


def read(page: str) -> Node:
    """The page as a tree."""
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert len(reader.open) == 1, f"unclosed: {[node.tag for node in reader.open]}"
    return reader.open[0]
