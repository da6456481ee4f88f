"""Rules of a readable page; each gives what breaks it, and `[]` where nothing does."""

# Text whose contrast with what is behind it is below 4.5 : 1 (WCAG 2.2, 1.4.3). What is disabled is
# exempt there; text on a canvas is not seen by this.
LOW_CONTRAST = """(() => {
  const parts = (text) => {
    const found = text.match(/[\\d.]+/g).map(Number);
    return found.length < 4 ? [...found, 1] : found;
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((part, k) => part * a + under[k] * (1 - a));
  const light = (colour) => {
    const [r, g, b] = colour.map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const above = (node) => node ? [...above(node.parentElement), node] : [];
  const ratio = (node) => {
    const styles = above(node).map((each) => getComputedStyle(each));
    const grounds = styles.map((s) => parts(s.backgroundColor));
    const behind = grounds.reduce((under, ground) => over(ground, under), [255, 255, 255]);
    const share = styles.reduce((all, s) => all * Number(s.opacity), 1);
    const [r, g, b, a] = parts(getComputedStyle(node).color);
    const lights = [light(over([r, g, b, a * share], behind)), light(behind)].sort((x, y) => y - x);
    return (lights[0] + 0.05) / (lights[1] + 0.05);
  };
  const shown = (node) => node.checkVisibility()
    && !node.closest(":disabled, option, style, script");
  const nodes = [...document.querySelectorAll("select")];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    if (walk.currentNode.textContent.trim()) nodes.push(walk.currentNode.parentElement);
  }
  return [...new Set(nodes)].filter(shown)
    .map((node) => [node.textContent.slice(0, 60), ratio(node)]).filter(([, value]) => value < 4.5);
})()"""

# What reaches over the right edge of the window, and is not in a box that scrolls by itself.
OVERFLOW = """(() => {
  const edge = document.documentElement.clientWidth;
  const scrolls = (node) => node !== null && node !== document.body && (
    getComputedStyle(node).overflowX !== "visible" || scrolls(node.parentElement));
  const found = [...document.body.querySelectorAll("*")].filter((node) => node.checkVisibility()
    && node.getBoundingClientRect().right > edge + 1 && !scrolls(node.parentElement));
  const names = found.map((node) => `${node.tagName} ${node.className}`);
  const wide = document.documentElement.scrollWidth > edge;
  return wide && !names.length ? ["the page"] : names;
})()"""

# Roles that a user acts on or has to be told of, so that each needs a name.
NAMED = {
    "button", "combobox", "checkbox", "textbox", "application", "image", "img", "Canvas",
    "progressbar", "region", "list",
}  # fmt: skip


def nameless(accessible: list[tuple[str, str]]) -> list[str]:
    """The roles that have no name and need one."""
    return [role for role, name in accessible if role in NAMED and not name.strip()]
