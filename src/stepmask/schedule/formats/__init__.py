"""Tables of other tools, a module each: `read` makes a `MaskSchedule` of one, `write` one of a `MaskSchedule`."""
