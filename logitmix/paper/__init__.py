"""The paper's runs, tables, figures and claims: recipes, scales and verdicts."""
