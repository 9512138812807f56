"""The record of a run (`llmprune.json`), and what is made from it: report, model card, figures in words."""
