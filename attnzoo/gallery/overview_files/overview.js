// Filters the cards of the overview. What can be chosen stands in the form, what a card has in its data attributes.
"use strict";
(() => {
  const form = document.querySelector(".zoo-filter");
  const cards = [...document.querySelectorAll(".zoo-cards > li")];
  if (!form || !cards.length) return;
  const text = form.elements.text;
  const boxes = [...form.querySelectorAll("input[type=checkbox]")];
  const status = form.querySelector("output");
  const has = new Map(cards.map((card) => [card, {
    words: `${card.textContent} ${card.dataset.words} ${Object.values(card.dataset).join(" ")}`.toLowerCase(),
    ...Object.fromEntries(boxes.map((box) => [box.name, (card.dataset[box.name] ?? "").split("|")])),
  }]));

  // what is chosen: facet -> values
  const chosen = () => {
    const found = new Map();
    for (const box of boxes) if (box.checked) found.set(box.name, [...(found.get(box.name) ?? []), box.value]);
    return found;
  };
  // every mask that is chosen, one value of any other facet
  const meets = (card, facets) => [...facets].every(([facet, values]) =>
    facet === "mask" ? values.every((one) => has.get(card).mask.includes(one))
      : values.some((one) => has.get(card)[facet].includes(one)));

  const show = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const said = cards.filter((card) => words.every((word) => has.get(card).words.includes(word)));
    const facets = chosen();
    const shown = new Set(said.filter((card) => meets(card, facets)));
    for (const card of cards) card.hidden = !shown.has(card);
    for (const list of document.querySelectorAll(".zoo-cards")) {
      const section = list.closest("section") ?? list;
      section.hidden = !list.querySelector(":scope > li:not([hidden])");
    }
    // beside a value: how many there would be with it
    for (const box of boxes) {
      const values = box.name === "mask" ? [...(facets.get("mask") ?? []), box.value] : [box.value];
      const others = new Map([...facets, [box.name, values]]);
      box.parentElement.querySelector("span").textContent = said.filter((card) => meets(card, others)).length;
    }
    status.textContent = `${shown.size} of ${cards.length}`;
  };

  // the choice as a fragment, `#text=kernel&mask=causal`, that can be sent to somebody
  const write = () => {
    const query = new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
    const here = location.href.split("#")[0];
    history.replaceState(null, "", String(query) ? `${here}#${query}` : here);
  };
  const read = () => {
    const fragment = location.hash.slice(1);
    if (fragment && !fragment.includes("=")) return; // an anchor
    const query = new URLSearchParams(fragment);
    text.value = query.get("text") ?? "";
    for (const box of boxes) box.checked = query.getAll(box.name).includes(box.value);
  };
  const update = () => { write(); show(); };

  // the card that lies from another in a direction of the arrows
  const links = () => cards.filter((card) => !card.hidden).map((card) => card.querySelector("a"));
  const next = (from, key) => {
    const all = links();
    const at = all.indexOf(from);
    if (key === "ArrowRight") return all[at + 1];
    if (key === "ArrowLeft") return all[at - 1];
    if (key === "Home") return all[0];
    if (key === "End") return all[all.length - 1];
    const { left, top } = from.parentElement.getBoundingClientRect();
    const sign = key === "ArrowDown" ? 1 : -1;
    const beyond = all.map((link) => [link, link.parentElement.getBoundingClientRect()])
      .filter(([, box]) => sign * (box.top - top) > 1);
    const row = sign * Math.min(...beyond.map(([, box]) => sign * box.top));
    return beyond.filter(([, box]) => Math.abs(box.top - row) < 1)
      .sort(([, one], [, other]) => Math.abs(one.left - left) - Math.abs(other.left - left))[0]?.[0];
  };

  // in the capturing phase, because the theme has a search of its own at `/`
  window.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const target = event.target;
    const typing = target.matches?.("input:not([type=checkbox]), textarea, select, [contenteditable]");
    const card = target.closest?.(".zoo-cards a");
    let to = null;
    if (event.key === "/" && !typing) to = text;
    else if (event.key === "Escape" && (!typing || target === text)) {
      form.reset();
      to = text;
    } else if (card && /^(Arrow|Home$|End$)/.test(event.key)) to = next(card, event.key) ?? (event.key === "ArrowUp" ? text : null);
    else if (target === text && event.key === "ArrowDown") to = links()[0];
    if (!to) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    to.focus();
    if (to === text) text.select();
  }, true);

  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update)); // once the fields are empty
  window.addEventListener("hashchange", () => { read(); show(); });
  read();
  form.hidden = false;
  // on a phone the cards come first, unless a link has chosen
  form.querySelector("details").open = !matchMedia("(max-width: 30rem)").matches || boxes.some((box) => box.checked);
  show();
})();
