"""The kinds of router there are."""

# Kind -> class, imported when asked for: a server that runs one kind need not import the others.
KINDS = {
    "tryage": "signalbox.router.tryage:TryagePredictor",
    "lexical": "signalbox.router.lexical:LexicalPredictor",
    "knn": "signalbox.router.knn:KnnPredictor",
    "linear": "signalbox.router.linear:LinearPredictor",
    "composition": "signalbox.router.composition:CompositionPredictor",
    "stacked": "signalbox.router.stacked:StackedPredictor",
    "cascade": "signalbox.router.cascade:CascadePredictor",
    "single": "signalbox.router.single:SinglePredictor",
    "irt": "signalbox.router.irt:IrtPredictor",
    "glider": "signalbox.router.glider:GliderPredictor",
    "skills": "signalbox.router.skills:SkillsPredictor",
}
