// Sets the theme before anything is drawn, so that a dark page does not flash white. A classic script: it runs
// before the modules. `shell/appearance.js` changes the choice.
{
  const chosen = localStorage.getItem("cordee-theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
}
