# The guest's source, where tracebacks look for it.

CODE_NAME = "<code>"  # the guest's code in its tracebacks
CELL_NAME = "<code %d>"  # and that of a kernel's runs, whose functions outlive them
SOURCES = 256  # of a kernel's runs, the last ones whose lines tracebacks show


class SourceFinder:
    """Puts the guest's source where tracebacks look for it, once `linecache` is imported."""

    sources = {}

    def remember(self, name, source):
        self.sources[name] = source
        if len(self.sources) > SOURCES:
            forgotten = next(iter(self.sources))
            del self.sources[forgotten]
            if "linecache" in sys.modules:
                sys.modules["linecache"].cache.pop(forgotten, None)
        if "linecache" in sys.modules:
            sys.modules["linecache"].cache[name] = self.entry(name)

    def entry(self, name):
        """As Python counts lines, each with its end, as those of a file: carets are placed by it."""
        source = self.sources[name]
        lines = source.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        return len(source), None, [line + "\n" for line in lines], name

    def find_spec(self, name, path=None, target=None):
        if name != "linecache":
            return None
        sys.meta_path.remove(self)
        spec = sys.modules["_frozen_importlib_external"].PathFinder.find_spec(name)
        execute = spec.loader.exec_module
        entries = {name: self.entry(name) for name in self.sources}

        class Loader:
            create_module = staticmethod(lambda spec: None)

            @staticmethod
            def exec_module(module):
                execute(module)
                module.cache.update(entries)

        spec.loader = Loader
        return spec


FINDER = SourceFinder()
