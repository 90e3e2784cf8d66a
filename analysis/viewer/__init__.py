"""One page to look inside the errors: token traces of two precisions side by side, in a single file.

Averages say *how much* a quantized model errs; this page shows *where*. Each token is coloured by its entropy, the
point where the two models part is marked, and pointing at a token shows what each precision would have said there.

The page is one HTML file that needs no server and no network, so that it can be mailed, archived and opened years
later. What that costs: all numbers travel inside it. They are kept small (:mod:`analysis.viewer.encode`: five to twenty
bytes a token and precision, most where a model is unsure), unpacked one trace at a time, and only the problem that is
looked at is drawn; a thousand traces of five hundred tokens open at once. A content security policy lets nothing but
the page's own script run, and whatever models wrote is only ever set as text.

Source of the question: arXiv 2606.15682, section 3.
"""

from __future__ import annotations

from analysis.viewer.page import Page, build_page, write_page

__all__ = ["Page", "build_page", "write_page"]
