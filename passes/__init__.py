"""Graph rewrites: rules, the matcher that finds them, and the stages that apply them in order."""
