"""Search of budget profiles (EvolKV): how many tokens each layer keeps, found on samples and tested on others."""

from kvjax.search.config import SearchConfig
from kvjax.search.report.render import html
from kvjax.search.result import SearchResult
from kvjax.search.run import Search, search

SearchResult._repr_html_ = html

__all__ = ["Search", "SearchConfig", "SearchResult", "search"]
