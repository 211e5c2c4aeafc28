"use strict";
// Draws the figures of the page's data, and the text whose decisions a reader chooses.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Figures -----------------------------------------------------------------------------------------------------------

  // The page's own colours, so that figures change with it between light and dark.
  function themed(layout) {
    const style = getComputedStyle(root);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--muted"), automargin: true };
    return {
      ...layout,
      paper_bgcolor: "rgba(0, 0, 0, 0)",
      plot_bgcolor: "rgba(0, 0, 0, 0)",
      font: { color: colour("--text"), family: style.fontFamily, size: 13 },
      hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--muted"), font: { color: colour("--text") }, namelength: -1 },
      modebar: { bgcolor: "rgba(0, 0, 0, 0)", color: colour("--muted"), activecolor: colour("--text") },
      xaxis: { ...axis, ...layout.xaxis },
      yaxis: { ...axis, ...layout.yaxis },
    };
  }

  const coarse = matchMedia("(pointer: coarse)").matches;

  function draw(section) {
    const choices = data.figures[section.id];
    const chooser = section.querySelector("select");
    const choice = choices[chooser ? chooser.selectedIndex : 0];
    const box = section.querySelector(".plots");
    while (box.children.length > choice.plots.length) {
      Plotly.purge(box.lastChild);
      box.lastChild.remove();
    }
    // All places first: they share a line, and a figure takes its width from its place.
    while (box.children.length < choice.plots.length) {
      const place = document.createElement("div");
      place.className = "plot";
      place.setAttribute("role", "img");
      box.append(place);
    }
    choice.plots.forEach((plot, number) => {
      const place = box.children[number];
      place.setAttribute("aria-label", `${section.querySelector("h2").textContent}: ${chooser ? chooser.value : choice.name}`);
      // plotly writes into what it is given, and a figure is drawn more than once.
      const { data: traces, layout } = structuredClone(plot);
      if (traces[0].type === "scatter") {
        const rows = Math.ceil(traces.length / Math.max(1, Math.floor(place.clientWidth / 230)));
        layout.height = 330 + 22 * rows;
        layout.margin.b = 60 + 22 * rows;
      }
      place.style.height = `${layout.height}px`;
      // A finger that drags is meant to move the page.
      layout.dragmode = coarse ? false : "zoom";
      Plotly.react(place, traces, themed(layout), {
        responsive: true,
        displayModeBar: coarse ? false : "hover",
        // No others: some send the figure to a server.
        modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
        displaylogo: false,
      });
    });
  }

  const figures = all("section.figure");
  const drawAll = () => figures.forEach(draw);
  for (const section of figures) section.querySelector("select")?.addEventListener("change", () => draw(section));
  drawAll();
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) drawAll();
    width = innerWidth;
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  // Paper is white.
  for (const [event, on] of [["beforeprint", true], ["afterprint", false]]) {
    addEventListener(event, () => {
      root.classList.toggle("printed", on);
      drawAll();
    });
  }

  // The text ----------------------------------------------------------------------------------------------------------

  const text = data.text;
  if (text) {
    const box = document.getElementById("tokens");
    const said = document.getElementById("fate");
    const [layer, head] = ["layer", "head"].map((name) => document.getElementById(name));
    const fate = {
      k: (slot) => `kept in a slot of its own, number ${slot}`,
      m: (slot) => `merged into slot ${slot}`,
      e: () => "evicted",
      a: () => "absorbed into the residual slot",
      w: () => "still in the window: its decision has not taken effect",
    };
    let kinds = "";
    let slots = [];
    const shown = (token) => token.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
    const described = (i) => {
      const alpha = kinds[i] === kinds[i].toUpperCase() ? 1 : 0;
      const first = alpha === 1 && kinds[i] === "K" ? " (nothing is before it)" : "";
      return `token ${i + 1}, “${shown(text.tokens[i])}”: alpha ${alpha}, ${fate[kinds[i].toLowerCase()](slots[i])}${first}`;
    };
    const buttons = text.tokens.map((token, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = shown(token) || "∅";
      button.tabIndex = i === 0 ? 0 : -1;
      box.append(button);
      if (token.includes("\n")) box.append(document.createElement("br"));
      for (const event of ["focus", "mouseenter", "click"]) button.addEventListener(event, () => show(i));
      return button;
    });
    function show(chosen) {
      said.textContent = described(chosen);
      const together = (i) => slots[i] > 0 && slots[i] === slots[chosen];
      buttons.forEach((button, i) => button.classList.toggle("together", i === chosen || together(i)));
    }
    box.addEventListener("keydown", (event) => {
      const now = buttons.indexOf(document.activeElement);
      const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: buttons.length - 1 }[event.key];
      if (next === undefined || now < 0) return;
      event.preventDefault();
      const target = buttons[Math.min(Math.max(next, 0), buttons.length - 1)];
      buttons.forEach((button) => (button.tabIndex = button === target ? 0 : -1));
      target.focus();
    });
    function colour() {
      kinds = text.kinds[layer.selectedIndex][head.selectedIndex];
      slots = text.slots[layer.selectedIndex][head.selectedIndex];
      buttons.forEach((button, i) => {
        button.className = `token fate-${kinds[i].toLowerCase()}`;
        button.title = described(i);
      });
      said.textContent = "Point at a token, or move with the arrow keys.";
    }
    layer.addEventListener("change", colour);
    head.addEventListener("change", colour);
    colour();
  }

  // The table ---------------------------------------------------------------------------------------------------------

  all("th button").forEach((button) => {
    button.addEventListener("click", () => {
      const header = button.closest("th");
      const up = header.getAttribute("aria-sort") !== "ascending";
      all("th", header.parentNode).forEach((each) => each.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = header.closest("table").tBodies[0];
      const value = (row) => row.cells[header.cellIndex].dataset.value;
      const compared = (a, b) => {
        // Empty cells come last either way.
        if (a === "" || b === "") return (a === "") - (b === "");
        const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
        return up ? order : -order;
      };
      body.append(...[...body.rows].sort((a, b) => compared(value(a), value(b))));
    });
  });
})();
