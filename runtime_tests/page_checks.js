// What a reader with a keyboard, a screen reader or weak eyes would stumble over; returns a list of sentences.
(() => {
  const found = [];
  const say = (what, node) => found.push(what + ": " + (node.outerHTML || node.textContent || "").slice(0, 120));
  const all = (query) => [...document.querySelectorAll(query)];

  // structure
  if (!document.documentElement.lang) found.push("no language");
  if (!document.title) found.push("no title");
  if (all("main").length !== 1) found.push("not exactly one main");
  if (all("h1").length !== 1) found.push("not exactly one h1");
  let level = 0;
  for (const heading of all("h1, h2, h3, h4, h5, h6")) {
    const own = Number(heading.tagName[1]);
    if (own > level + 1) say("heading skips a level", heading);
    if (!heading.textContent.trim()) say("empty heading", heading);
    level = own;
  }
  const ids = all("[id]").map((node) => node.id);
  for (const id of new Set(ids)) if (ids.filter((other) => other === id).length > 1) found.push("id twice: " + id);
  for (const link of all("a")) {
    const target = link.getAttribute("href");
    if (!target || !target.startsWith("#") || !document.getElementById(target.slice(1))) say("link leads nowhere", link);
    if (!link.textContent.trim()) say("link without text", link);
  }
  for (const node of all("[aria-labelledby]"))
    if (!document.getElementById(node.getAttribute("aria-labelledby"))) say("label missing", node);
  for (const cell of all("th")) if (!cell.getAttribute("scope")) say("th without scope", cell);
  for (const table of all("table")) if (!table.querySelector("thead th")) say("table without headers", table);
  for (const drawing of all("svg"))
    if (drawing.getAttribute("aria-hidden") !== "true" && !(drawing.getAttribute("role") === "img" && drawing.getAttribute("aria-label")))
      say("svg without label", drawing);
  for (const node of all("[tabindex='0']"))
    if (!node.getAttribute("aria-label") && !node.getAttribute("aria-labelledby")) say("focusable without name", node);
  for (const node of all("script, link, img, iframe, [onclick], [onload], [onerror]")) say("foreign or active element", node);

  // contrast: WCAG 2.2, relative luminance of text against the nearest opaque background
  const parts = (colour) => (colour.match(/[\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parts(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  for (const box of all("details")) box.open = true;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let texts = 0, least = 21;
  while (walker.nextNode()) {
    const node = walker.currentNode, holder = node.parentElement;
    if (!node.textContent.trim() || ["TITLE", "STYLE"].includes(holder.tagName.toUpperCase())) continue;
    const style = getComputedStyle(holder);
    const ink = parts(holder instanceof SVGElement ? style.fill : style.color);
    const [high, low] = [light(ink), light(ground(holder))].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    texts += 1;
    least = Math.min(least, ratio);
    if (ratio < 4.5) say("contrast " + ratio.toFixed(2), holder);
  }

  // layout
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  if (wide > 0) {
    found.push("page is " + wide + " px wider than the window");
    for (const node of all("body *"))
      if (!node.closest(".wide, .heatmap, pre") && node.getBoundingClientRect().right > window.innerWidth + 1) say("too wide", node);
  }
  return {found, texts, least};
})()
