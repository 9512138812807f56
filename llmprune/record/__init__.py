"""The record of a run, and the pages made from it: report, model card, figures in words."""
