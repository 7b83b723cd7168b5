"""Better weights out of many: what to weigh each checkpoint with, recipes, their materialisation, and the search for one."""
