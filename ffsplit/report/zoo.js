const tools = document.getElementById("tools");
const body = document.querySelector("#models tbody");
const rows = [...body.rows];
const control = (id) => document.getElementById(id);
function show() {
  const words = control("find").value.toLowerCase(), state = control("state").value;
  const key = control("sort").value.replace("-", ""), down = control("sort").value.startsWith("-") ? -1 : 1;
  const compared = (a, b) => {
    const [x, y] = [a.dataset[key], b.dataset[key]];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return key === "name" ? x.localeCompare(y) : down * (x - y);
  };
  body.append(...(key ? [...rows].sort(compared) : rows));
  for (const row of rows) {
    const found = row.dataset.name.toLowerCase().includes(words);
    row.hidden = !found || (state !== "" && row.dataset.state !== state);
  }
}
tools.hidden = false;
tools.addEventListener("input", show);
