const charts = JSON.parse(document.getElementById("charts").textContent);
const options = { renderer: "svg", actions: false, tooltip: { disableDefaultStyle: true } };

async function drawAll() {
  for (const [id, spec] of Object.entries(charts)) {
    await vegaEmbed(document.getElementById(id), spec, options);
  }
}

drawAll().then(
  () => { document.body.dataset.drawn = "yes"; },
  (error) => { document.body.dataset.drawn = "no"; throw error; },
);
