"""The paper's runs, tables, figures and claims: recipes, presets and verdicts."""
