"use strict";
(() => {
  const all = (what, within = document) => [...within.querySelectorAll(what)];

  // Tables: a button in the head of each column sorts by it; again, the other way round. What has no value
  // stays at the end either way.
  const keyOf = (row, place) => {
    const cell = row.cells[place];
    const text = cell.dataset.sort ?? cell.textContent.trim();
    return text === "" || text === "-" ? null : isNaN(text) ? text : Number(text);
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b
      : String(a).localeCompare(String(b), "en", { numeric: true });
  const sort = (table, head) => {
    const down = head.getAttribute("aria-sort") === "ascending";
    all("th", head.parentNode).forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].map((row) => [keyOf(row, head.cellIndex), row]);
    rows.sort(([a], [b]) =>
      a === null || b === null ? (a === null) - (b === null) : (down ? -1 : 1) * compare(a, b));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  };
  all("table.sortable").forEach((table) => all("thead th", table).forEach((head) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => sort(table, head));
  }));

  // Values: what an element's title says is shown at once on hover, touch and focus.
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const show = (element) => {
    const text = element && element.dataset.said;
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const at = element.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(at.left, document.documentElement.clientWidth - own.width - 6);
    tip.style.left = `${Math.max(6, left)}px`;
    tip.style.top = `${at.top > own.height + 10 ? at.top - own.height - 6 : at.bottom + 6}px`;
  };
  const said = (event) => show(event.target.closest?.("[data-said]"));
  document.addEventListener("pointerover", said);
  document.addEventListener("focusin", said);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

  // What scrolls by itself is a stop of the Tab key; what fits is none.
  const stops = () => all(".wide").forEach((part) => {
    const scrolls = part.scrollWidth > part.clientWidth || part.scrollHeight > part.clientHeight;
    part.setAttribute("tabindex", scrolls ? 0 : -1);
  });
  addEventListener("resize", stops);
  stops();

  // Maps and charts: one stop of the Tab key each; the arrow keys go from value to value.
  const walk = (cells, width) => {
    cells.forEach((cell, place) => {
      const title = cell.querySelector("title");
      cell.dataset.said = cell.title || title?.textContent || "";
      cell.removeAttribute("title");
      title?.remove();
      cell.setAttribute("tabindex", place ? -1 : 0);
      cell.addEventListener("keydown", (event) => {
        const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -width, ArrowDown: width };
        const next = cells[place + steps[event.key]] ?? { Home: cells[0], End: cells.at(-1) }[event.key];
        if (!next) return;
        event.preventDefault();
        cell.setAttribute("tabindex", -1);
        next.setAttribute("tabindex", 0);
        next.focus();
      });
    });
  };
  all("table.heat").forEach((table) => walk(all("td", table), table.rows[0].cells.length - 1));
  all(".chart > svg").forEach((chart) => walk(all(".point", chart), 1));

  // Texts to copy. The clipboard of a page opened from a file may be closed to scripts: then the text is
  // marked, so that the keyboard copies it.
  all("button.copy").forEach((button) => {
    const name = button.textContent, text = button.parentNode.querySelector("code");
    button.hidden = false;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(text);
        button.textContent = "Marked: press Ctrl+C";
      }
      setTimeout(() => { button.textContent = name; }, 2500);
    });
  });

  // On paper everything is open.
  addEventListener("beforeprint", () => all("details").forEach((part) => { part.open = true; }));
})();
