"use strict";
for (const box of document.querySelectorAll(".case")) {
  const pictures = JSON.parse(box.querySelector("script").textContent);
  const slider = box.querySelector("input[type=range]");
  const shown = box.querySelector("output");
  const images = box.querySelectorAll(".view img");
  const show = () => {
    const place = Number(slider.value);
    const text = "slice " + pictures.slices[place] + " of " + pictures.total;
    box.style.setProperty("--scan", 'url("' + pictures.scans[place] + '")');
    images.forEach((image, layer) => { image.src = pictures.layers[layer][place]; });
    slider.setAttribute("aria-valuetext", text);
    shown.textContent = text;
    box.dataset.slice = String(pictures.slices[place]);
  };
  const step = (by) => {
    slider.value = String(Number(slider.value) + by);
    show();
  };
  slider.addEventListener("input", show);
  box.querySelectorAll(".slider button").forEach((button) => button.addEventListener("click", () => step(Number(button.value))));
  box.querySelector(".slider").hidden = pictures.slices.length < 2;
}
for (const box of document.querySelectorAll("input[data-turns]")) {
  const kind = box.dataset.turns;
  box.closest("label").hidden = false;
  box.addEventListener("change", () => document.querySelector("#gallery").classList.toggle(kind, box.checked !== (kind === "bare")));
}
