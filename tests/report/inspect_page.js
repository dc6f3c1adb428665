// What is wrong with a page as it is shown: {overflow, pictures, contrast}, each a list of texts.
(() => {
  const overflow = [], pictures = [], contrast = [];
  const describe = element => `${element.tagName.toLowerCase()}.${element.getAttribute("class") ?? ""} ` +
    JSON.stringify((element.textContent ?? "").trim().slice(0, 40));
  const isShown = element => element.checkVisibility({ visibilityProperty: true });

  // Nothing may be wider than the window, but for what scrolls in a box of its own.
  const width = document.documentElement.clientWidth, isPrinted = matchMedia("print").matches;
  if (document.documentElement.scrollWidth > width) overflow.push(`page: ${document.documentElement.scrollWidth} > ${width}`);
  for (const element of document.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    if (isShown(element) && box.right > width + 1 && box.width > 0 && !element.closest(isPrinted ? "svg" : ".scroll, svg")) {
      overflow.push(`${describe(element)}: to ${Math.round(box.right)} of ${width}`);
    }
  }

  for (const image of document.images) {
    if (!image.complete || image.naturalWidth === 0) pictures.push(`${describe(image)} ${image.alt}`);
    if (!image.alt) pictures.push(`without words: ${image.src.slice(0, 40)}`);
  }

  // Contrast of every shown text with what lies behind it, as WCAG 2.2 measures it (1.4.3, level AA).
  const parse = text => {
    const parts = text.match(/[\d.]+/g);
    if (!parts || text === "none" || text === "transparent") return [0, 0, 0, 0];
    const [red, green, blue, alpha = 1] = parts.map(Number);
    return [red, green, blue, alpha];
  };
  const over = (top, below) => top.slice(0, 3).map((value, i) => value * top[3] + below[i] * (1 - top[3])).concat(1);
  const luminance = color => color.slice(0, 3).map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (one, other) => {
    const [high, low] = [luminance(one), luminance(other)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
  // The layers behind an element, from the front: shapes of a figure, and grounds of the elements around it.
  const grounds = (element, x, y) => {
    const layers = [];
    if (element.closest("svg")) {
      for (const shape of document.elementsFromPoint(x, y)) {
        if (!shape.closest("svg") || shape.tagName === "svg" || shape.closest("text")) continue;
        const style = getComputedStyle(shape), fill = parse(style.fill);
        fill[3] *= Number(style.fillOpacity) * Number(style.opacity);
        layers.push(fill);
      }
    }
    for (let box = element.closest("svg") ?? element; box; box = box.parentElement) layers.push(parse(getComputedStyle(box).backgroundColor));
    return layers;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || ["SCRIPT", "STYLE"].includes(element.tagName) || !isShown(element)) continue;
    const range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    const box = range.getBoundingClientRect();
    if (box.width === 0) continue;
    const style = getComputedStyle(element), svg = element.closest("svg");
    const canvas = matchMedia("screen and (prefers-color-scheme: dark)").matches ? [0, 0, 0, 1] : [255, 255, 255, 1];
    const ground = grounds(element, box.x + box.width / 2, box.y + box.height / 2)
      .reverse().reduce((below, layer) => over(layer, below), canvas);
    const color = parse(svg ? style.fill : style.color);
    color[3] *= svg ? Number(style.fillOpacity) : 1;
    for (let around = element; around; around = around.parentElement) color[3] *= Number(getComputedStyle(around).opacity);
    const size = parseFloat(style.fontSize), isLarge = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const reached = ratio(over(color, ground), ground);
    if (reached < (isLarge ? 3 : 4.5)) contrast.push(`${describe(element)}: ${reached.toFixed(2)}`);
  }
  return { overflow, pictures, contrast };
})()
