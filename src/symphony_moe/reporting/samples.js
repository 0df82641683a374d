(() => {
  // Colours each token by its expert in the layer and model that are chosen. Without a script the
  // page shows the mean over layers.
  const box = document.querySelector(".samples");
  if (!box) return;
  const names = [...box.querySelectorAll(".experts li")].map((one) => one.textContent.trim());
  const tokens = [...box.querySelectorAll(".token")];
  const form = box.querySelector("form");
  const readout = box.querySelector("output");
  const stage = form.elements.namedItem("stage");
  const layer = form.elements.namedItem("layer");
  const layerName = (number) => (number ? `layer ${layer.options[number].textContent}` : "mean over layers");
  const choices = (token) =>
    token.dataset[stage.value].split(" ").map((one) => one.split(":").map(Number));
  const colour = () => {
    const number = Number(layer.value);
    for (const token of tokens) {
      const [expert, by] = choices(token)[number];
      token.className = `token e${expert % 8} s${Math.floor(expert / 8) % 3}`;
      token.style.setProperty("--by", `${by}%`);
      token.title = `${names[expert]} ${by} %, ${layerName(number)}`;
    }
  };
  const tell = (token) => {
    const words = choices(token).map(([expert, by], number) =>
      `${layerName(number)}: ${names[expert]} ${by} %`);
    readout.textContent = `“${token.textContent}”  ${words.join(" · ")}`;
    readout.className = "telling";
    box.querySelector(".token.told")?.classList.remove("told");
    token.classList.add("told");
  };
  form.addEventListener("change", colour);
  form.addEventListener("submit", (event) => event.preventDefault());
  box.addEventListener("click", (event) => {
    const token = event.target.closest(".token");
    if (token) tell(token);
  });
  form.hidden = false;
  readout.hidden = false;
  colour();
})();
